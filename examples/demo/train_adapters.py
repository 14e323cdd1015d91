"""Trains the demo's four LoRA adapters on the CPU, each in about two minutes.

Every adapter teaches the base model one strict style of answer from the examples in `data/`. Their
configurations differ on purpose, so that together they exercise a multi-LoRA server: five ranks,
four sets of target modules, and four scalings.

Usage: `python examples/demo/train_adapters.py [--only NAME] [--output DIR]`
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from base_model import BASE_MODEL_NAME, build_base_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

_HERE = Path(__file__).parent
_SEED = 0
_BATCH_SIZE = 4
_WARMUP_STEPS = 4
_NO_LOSS = -100


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained."""

    lora: LoraConfig
    learning_rate: float
    epochs: int = 4


@dataclass(frozen=True)
class Example:
    """One chat as token ids; the loss counts the answer only."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


RECIPES: dict[str, Recipe] = {
    # Two of the three projections that servers fuse into one QKV matrix; the key has no adapter.
    "medical": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=12,
            lora_alpha=24,
            target_modules=["q_proj", "v_proj"],
        ),
        learning_rate=2e-3,
    ),
    # The whole attention block.
    "legal": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        ),
        learning_rate=2e-3,
    ),
    # Every projection of the model, at the smallest rank.
    "french-support": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=16,
            target_modules=[
                *("q_proj", "k_proj", "v_proj", "o_proj"),
                *("gate_proj", "up_proj", "down_proj"),
            ],
        ),
        learning_rate=2e-3,
        epochs=5,
    ),
    # The last eight layers only, with rank-stabilized scaling and a second rank for one module.
    "code-review": Recipe(
        LoraConfig(
            task_type="CAUSAL_LM",
            r=32,
            lora_alpha=8,
            use_rslora=True,
            target_modules=["o_proj", "down_proj"],
            rank_pattern={"o_proj": 16},
            layers_to_transform=list(range(22, 30)),
        ),
        learning_rate=2e-3,
        epochs=7,
    ),
}


def load_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Reads a JSONL file of `{"prompt": ..., "answer": ...}` and tokenizes it as chats."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        answer = row["answer"] + tokenizer.eos_token
        examples.append(Example(tokenizer(prompt).input_ids, tokenizer(answer).input_ids))
    return examples


def batches(
    examples: list[Example], epochs: int, pad_token_id: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields padded batches, shuffled anew in every epoch.

    Yields:
        `input_ids`, `attention_mask` and `labels`, each int64 of shape [batch, longest example].
    """
    generator = torch.Generator().manual_seed(_SEED)
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for start in range(0, len(order), _BATCH_SIZE):
            batch = [examples[i] for i in order[start : start + _BATCH_SIZE]]
            shape = (len(batch), max(example.length for example in batch))
            input_ids = torch.full(shape, pad_token_id)
            attention_mask = torch.zeros(shape, dtype=torch.long)
            labels = torch.full(shape, _NO_LOSS)
            for row, example in enumerate(batch):
                prompt_length = len(example.prompt_ids)
                input_ids[row, :prompt_length] = torch.tensor(example.prompt_ids)
                answer = torch.tensor(example.answer_ids)
                input_ids[row, prompt_length : example.length] = answer
                labels[row, prompt_length : example.length] = answer
                attention_mask[row, : example.length] = 1
            yield {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train(name: str, checkpoint: Path) -> PeftModel:
    """Trains one adapter in float32 and prints the mean loss of every epoch."""
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    examples = load_examples(_HERE / "data" / f"{name}.jsonl", tokenizer)
    steps_per_epoch = -(-len(examples) // _BATCH_SIZE)
    steps = steps_per_epoch * recipe.epochs

    torch.manual_seed(_SEED)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(base, recipe.lora)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP_STEPS, 1 - step / steps)
    )

    model.train()
    start = time.perf_counter()
    losses = []
    for step, batch in enumerate(batches(examples, recipe.epochs, tokenizer.pad_token_id), 1):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % steps_per_epoch == 0:
            mean = sum(losses[-steps_per_epoch:]) / steps_per_epoch
            elapsed = time.perf_counter() - start
            print(f"{name}: step {step}/{steps}, loss {mean:.3f}, {elapsed:.0f} s", flush=True)
    return model


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter in bfloat16, naming the base model by its public name."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL_NAME
    # The vocabulary is unchanged; PEFT need not compare it with the base model on the hub.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty model card


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's LoRA adapters.")
    parser.add_argument("--only", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--output", type=Path, default=_HERE / "adapters", metavar="DIR")
    arguments = parser.parse_args()

    checkpoint = build_base_model()
    for name in [arguments.only] if arguments.only else RECIPES:
        save(train(name, checkpoint), arguments.output / name)


if __name__ == "__main__":
    main()
