"""Everything that is to be found out on a card, in one call: `tools/gpu/run.sh`."""
