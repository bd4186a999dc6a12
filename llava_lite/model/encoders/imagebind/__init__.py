"""ImageBind: images, videos, texts, sounds, depth, thermal images, IMU records and clouds to one embedding space.

Girdhar et al. 2023 (arXiv 2305.05665) with the 3D branch of Point-Bind (Guo et al. 2023, arXiv 2309.00615), which
trained Point-BERT (Yu et al. 2022, arXiv 2111.14819) into the same space; ImageBind-LLM (arXiv 2309.03905) reads both.
"""
