"""The policies that come with the package, in files by their rule; `registry` knows their names."""
