"""Where rows come from: files, archives, tables, hubs, the web, and names in the registry."""
