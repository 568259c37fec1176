"""LIBERO's tasks on this project's robosuite and MuJoCo, as their authors run them (docs/libero.md)."""
