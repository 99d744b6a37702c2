"""Knowledge bases: texts read once, their pages kept on disk, asked in any later process.

What stores and checks files (`durable`, `container`, `manifest`, `leases`, `folder`, `shard`, `writer`, `check`,
`archive`) needs no torch; docs/knowledge_bases.md describes the format.
"""
