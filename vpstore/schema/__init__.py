"""The documents and names of vpstore as pure values: no file is opened, no clock and no environment is read here."""
