"""Where people already are: the shared cache behind the interfaces of other packages; one file each."""
