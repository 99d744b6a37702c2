"""Stage-1 data: readers, hard negatives, prepared pools and the samples that the page retriever is trained on."""

from .config import Stage1DataConfig, load_stage1_data_config, stage1_data_config
from .dataset import Stage1Dataset
from .pool import TokenPool
from .prepare import prepare_pool
from .sample import Stage1Sample, page_labels

__all__ = [
    "Stage1DataConfig",
    "Stage1Dataset",
    "Stage1Sample",
    "TokenPool",
    "load_stage1_data_config",
    "page_labels",
    "prepare_pool",
    "stage1_data_config",
]
