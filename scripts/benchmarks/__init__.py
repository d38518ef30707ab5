"""The parts that benchmark.py measures, one module each: `add_arguments` adds its flags, `measure` returns its rows."""
