"""Numbers shipped with the package; see ``skeletons.json`` for sources and licences."""
