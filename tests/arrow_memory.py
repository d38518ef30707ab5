"""Arrow takes its memory from malloc here: its own allocator reserves gigabytes and gives them back, which limits on
memory would count. Imported before anything that loads it; the processes that tests start are as a user's."""

import os

os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"
import pyarrow

assert pyarrow.default_memory_pool().backend_name == "system", "something has loaded Arrow before"
del os.environ["ARROW_DEFAULT_MEMORY_POOL"]
