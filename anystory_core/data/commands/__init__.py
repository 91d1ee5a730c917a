"""The commands of ``python -m anystory_core.data``, one file each: arguments and a converter."""
