"""One file a policy; `kv=<file name>` picks it."""
