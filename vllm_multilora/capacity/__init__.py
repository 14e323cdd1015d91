"""What a server can carry: its throughput and latencies for a trace, before the traffic is there.

    calibration = read_calibration(Path("calibration.json"))  # `measuring` made it of a server
    forecast(requests, sizes, server, calibration).first_token_s

`step_cost` is the model of a step's time and its fit, `engine` goes through a server's steps one by
one, with the classes that decide in a server. Nothing here knows vLLM.
"""
