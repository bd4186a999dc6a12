"""FlagPerf's LLaVA-1.5 case: both stages of training, MMMU, and tokens a second and MFU by its formulas."""
