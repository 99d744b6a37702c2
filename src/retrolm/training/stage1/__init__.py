"""Stage 1: contrastive training of the page retriever on a frozen backbone."""
