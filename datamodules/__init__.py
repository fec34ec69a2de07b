"""LightningDataModules: mock images and real images."""
