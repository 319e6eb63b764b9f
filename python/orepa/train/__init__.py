"""What `orepa train` and `orepa convert` run: Lightning Fabric around timm's models, data, optimizer and schedule.

Needs the extra ``train``. Nothing is imported here, so that the command line can say what is missing.
"""
