"""Runs on Flower's SuperLink and SuperNodes: the app they run, and how a command submits it."""
