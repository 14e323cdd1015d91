"""The command `plan`: its report, its plots, its JSON and its forecasts."""
