"""Watches servers from outside: where their adapters are, and what to change about it.

Clients of a server's HTTP routes and of Prometheus, and the rules that judge what they see.
"""
