"""Training: data, the page retriever (stage 1) and post-training on sparse KV (stage 2)."""
