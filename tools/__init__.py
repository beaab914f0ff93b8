"""Development tools of this repository. They are run from the top of a checkout and are not part of the wheel."""
