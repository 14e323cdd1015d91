"""The store's part of fetching: load requests that wait for files, and the fetching child."""
