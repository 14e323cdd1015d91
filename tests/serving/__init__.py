"""Serving tests: real vLLM engines and servers, judged by PEFT + transformers."""
