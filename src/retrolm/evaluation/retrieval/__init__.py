"""Page recall: how often each page index ranks the evidence among its best pages, layer by layer."""
