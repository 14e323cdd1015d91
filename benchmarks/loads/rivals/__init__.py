"""Other engines' programs, each run by an interpreter that has that engine and nothing of ours.

A program reads a job from standard input and writes what it measured to standard output, both JSON:

    {"model": folder, "gguf": file or null, "adapters": [folder or file, ...], "new_tokens": n,
     "requests": [{"prompt": text, "adapter": index}, ...], "rounds": n, "program": path or null}

    {"seconds": [of each round], "first_ms": [[of each request] of each round]}

All requests are there at the beginning of a round; a round before counts not.
"""
