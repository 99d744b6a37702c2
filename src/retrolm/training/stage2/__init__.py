"""Stage 2: post-training of the backbone on sparse KV, by plain language modelling on long documents."""
