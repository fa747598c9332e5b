"""From a segmentation competition's raw files to a submission proven valid."""
import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")   # albumentations would ask the network for its newest version at every import

__version__ = "0.1.0"
