"""Predicts what a server can carry: its throughput and latencies for a trace of requests.

    calibration = read_calibration(Path("calibration.json"))
    forecast(trace, sizes, server, calibration).first_token_p99

`measuring` times a server's steps and loads, `step_cost` is the model of a step's time, and
`fitting` fits it. `simulated_engine` simulates a server step by step, with the same classes that
make a server's decisions. Nothing here depends on vLLM.
"""
