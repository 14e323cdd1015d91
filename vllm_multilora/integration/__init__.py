"""Everything that touches vLLM; no other package of this project imports it."""
