"""The parts that benchmark.py measures, a module each: `add_arguments` its flags, `measure` its rows."""
