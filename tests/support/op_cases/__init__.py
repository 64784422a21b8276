"""Arguments of each op, one module an op: for the op tests and for the sanitizers' cases."""
