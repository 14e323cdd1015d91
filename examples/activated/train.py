"""Trains an activated adapter (aLoRA) that writes the ticket for a customer's message.

It acts from the last `<|im_start|>assistant` of a chat prompt on, which the chat template writes
itself: what the customer and the shop have said before is the base model's, and so are its keys and
values. About a minute on two CPU cores.

Usage: `python examples/activated/train.py [--output DIR] [--epochs N]`
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE.parent / "demo"))
from base_model import BASE_MODEL_NAME, build_base_model, default_cache_dir  # noqa: E402

INVOCATION = "<|im_start|>assistant\n"
"""The end of every chat prompt of SmolLM2."""

OUTPUT = default_cache_dir() / "ticket-adapter"
EPOCHS = 4
_BATCH_SIZE = 4
_LEARNING_RATE = 3e-3
_NO_LOSS = -100


def train(checkpoint: Path, epochs: int = EPOCHS) -> PeftModel:
    """Trains the adapter in float32 and prints the mean loss of every epoch."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    lines = (_HERE / "tickets.jsonl").read_text(encoding="utf-8").splitlines()
    examples = [_tokens(json.loads(line), tokenizer) for line in lines]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj"],
            alora_invocation_tokens=tokenizer.encode(INVOCATION, add_special_tokens=False),
        ),
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=_LEARNING_RATE, weight_decay=0.0)
    order, begin = random.Random(0), time.perf_counter()
    model.train()
    for epoch in range(1, epochs + 1):
        order.shuffle(examples)
        losses = []
        for at in range(0, len(examples), _BATCH_SIZE):
            loss = model(**_batch(examples[at : at + _BATCH_SIZE]), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        mean, elapsed = sum(losses) / len(losses), time.perf_counter() - begin
        print(f"  epoch {epoch}/{epochs}, loss {mean:.3f}, {elapsed:.0f} s", flush=True)
    return model


def _tokens(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A chat prompt, which ends with the invocation, and its answer."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["message"]}], add_generation_prompt=True, tokenize=False
    )
    answer = row["ticket"] + tokenizer.eos_token
    return tokenizer(prompt).input_ids, tokenizer(answer).input_ids


def _batch(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right; the loss counts answers only. int64 [batch, longest] each."""
    shape = len(examples), max(len(prompt) + len(answer) for prompt, answer in examples)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _NO_LOSS)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def save(model: PeftModel, folder: Path) -> None:
    """Writes the adapter as PEFT does, naming the base model by its public name."""
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL_NAME
    model.save_pretrained(folder, save_embedding_layers=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train an activated adapter.")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N")
    arguments = parser.parse_args()
    save(train(build_base_model(), arguments.epochs), arguments.output)
