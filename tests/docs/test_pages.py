"""The pages of the site: their examples run, and no public call is without one."""
