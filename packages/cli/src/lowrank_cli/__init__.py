"""The command `lowrank`."""
