"""The LoRA metrics: what they are, how engine processes record them, how servers show them.

A process that records has a file of its own in a folder of its engine (`value_folder`,
`series_file`); writing a value is a store into mapped memory. Whoever answers `/metrics` reads the
files of all processes and adds them up (`collector`). Nothing is sent from process to process.
"""
