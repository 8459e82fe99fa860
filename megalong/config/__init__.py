"""What a run is: one typed tree, read from YAML, checked before anything starts.

- `schema.Config` is the tree, `rope.RopeSettings` and `architecture.Architecture` are two of its parts that travel
  on their own (a checkpoint carries its architecture).
- `load.load_config(path, overrides)` reads a file and `section.key=value` overrides: one `Config` per stage.
- `checks.check_world` and `checks.check_model` compare a configuration with the number of processes and the model.
- `text.dump_config` and `text.config_text` write the resolved tree.

Nothing here imports torch: `megalong train` finds a user's mistake before any process is started.
"""
