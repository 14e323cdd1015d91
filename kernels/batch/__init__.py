"""Where the rows of a batch lie: runs of slots, and staging memory for plans."""
