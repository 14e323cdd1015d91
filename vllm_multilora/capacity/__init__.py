"""What a server can carry: its throughput and latencies for a trace, before the traffic is there.

    calibration = read_calibration(Path("calibration.json"))
    forecast(trace, sizes, server, calibration).first_token_p99

`measuring` times a server's steps and loads, `step_cost` is the model of a step's time, and
`fitting` its fit. `engine` goes through a server's steps one by one, with the classes that decide
in a server. Nothing here knows vLLM.
"""
