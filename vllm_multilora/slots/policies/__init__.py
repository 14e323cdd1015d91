"""The policies that come with the package, one a file; `registry` knows their names."""
