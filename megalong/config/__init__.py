"""The configuration of a run: one typed tree, read from YAML and checked before anything starts.

- `schema.Config` is the tree. `rope.RopeSettings` and `architecture.Architecture` are parts of it that are also used
  alone (a checkpoint stores its architecture).
- `load.load_config(path, overrides)` reads a file and `section.key=value` overrides: one `Config` per stage.
- `checks.check_world` and `checks.check_model` compare a configuration with the number of processes and the model.
- `text.dump_config` and `text.config_text` write the resolved tree.

Nothing here imports torch: `megalong train` finds a user's mistake before it starts any process.
"""
