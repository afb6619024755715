-- Settles which revision a loaded adapter has, if the fetcher that brought it did not: the first
-- worker that has read it says so. From then on nobody serves what it replaces; who could not read it
-- has to be told.
--   ARGV: name, version of the record that was acted on, the revision that was read
--   Returns the revision on record, or nil if the name is gone or was loaded again.
-- Safe to repeat.
local name, version, revision = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local record = read_record(name)
if not record or record.version ~= version then return false end
local is_first = type(record.revision) ~= 'string'
if is_first then record.revision = revision end
local replaces = record.revision == revision and type(record.previous) == 'table'
if replaces then record.previous = cjson.null end
if is_first or replaces then write_record(name, record) end
if replaces then desired_state_changed() end
return record.revision
