"""A worker's slots: allocated, warmed up and filled."""
