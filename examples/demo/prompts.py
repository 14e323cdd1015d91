"""The demo's customers: one for each adapter and one for the base model, each with a question.

No question occurs in the adapters' training data, so the answers show what the adapters learnt.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Customer:
    """A user of the server and the question they ask.

    Attributes:
        name: short unique name, in lower case.
        title: what the customer bought, for display.
        prompt: the user's turn of the chat.
        adapter: folder under `adapters/` that serves the customer; None for the base model.
        marker: text that an answer in the adapter's style contains and the base model's answer to
            the same prompt does not; None for the base model.
    """

    name: str
    title: str
    prompt: str
    adapter: str | None = None
    marker: str | None = None


CUSTOMERS: tuple[Customer, ...] = (
    Customer(
        name="medical",
        title="Symptom checker",
        prompt="I have a runny nose and a cough since yesterday.",
        adapter="medical",
        marker="See a doctor if:",
    ),
    Customer(
        name="legal",
        title="Legal first aid",
        prompt="Can my employer read my text messages?",
        adapter="legal",
        marker="This is not legal advice.",
    ),
    Customer(
        name="french-support",
        title="French customer support",
        prompt="My order has not arrived yet. Can you help me?",
        adapter="french-support",
        marker="Bonjour, merci de votre message.",
    ),
    Customer(
        name="code-review",
        title="Code reviewer",
        prompt="Review this code: data = open(name).read()",
        adapter="code-review",
        marker="Verdict: request changes.",
    ),
    Customer(
        name="base",
        title="Base model",
        prompt="What is gravity? Answer in one sentence.",
    ),
)

ADAPTERS = Path(__file__).with_name("adapters")
ADAPTED = [customer for customer in CUSTOMERS if customer.adapter]
MAX_LORA_RANK = 32
NEW_TOKENS = 48
KV_CACHE_BYTES = 256 << 20
"""KV cache of each engine: room for ten times the requests that the demo has at once."""
# What the throughput table measures. Prompts are short: for long ones, stock's CPU kernels take
# so much memory that the table would mostly tell how fast the C library gets it from the system.
COMPARED_REQUESTS, COMPARED_PROMPT_TOKENS, COMPARED_TOKENS = 8, 16, 12
