"""Options, worker set-up and Hypothesis profiles all live in the plugin that ports use too."""

pytest_plugins = ["nsa_ref.testing.plugin"]
