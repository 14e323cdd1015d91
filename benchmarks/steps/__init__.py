"""What a step costs, and how many tokens a server computes."""
