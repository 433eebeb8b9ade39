"""Questions: one file each (config -> record -> figure), the report, and the command line."""
