"""The pocket model: a small LLaVA trained on drawn scenes, shipped with the package."""
