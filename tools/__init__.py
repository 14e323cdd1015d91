"""What this repository's developers use, and nobody installs."""
