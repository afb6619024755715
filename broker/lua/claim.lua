-- Gives a worker jobs it can put into one batch: those of adapters it has in use, of the base
-- model, and of as many other adapters as it has free slots.
--   ARGV: worker, number of this claim, lease in ms, number of jobs, free slots, patience in ms,
--         n, then n adapters in use, m, then m adapters that may get no new jobs (draining),
--         then adapters resident in a slot that is not in use
--   Returns {now, starving, jobs, suspect, delayed, set aside, passed over}: starving is an adapter
--   that waits unserved for longer than the patience and found no slot ('' if none); each job is
--   {id, adapter, payload, attempts, queued, submission}; suspect is for how many ms the first one
--   that this worker can run waits, -1 if there is none; delayed is how many jobs wait to be tried
--   again later; set aside is how many were found now whose record is of a version that is not
--   read here; passed over are all entries that brought no job: there may be more behind them.
-- Safe to repeat, with the same number, until the next claim.
-- Free slots go to adapters that waited unserved beyond the patience, longest first; then to that
-- with the most waiting jobs, which fill the batch, unless one with more has a slot or needs none;
-- then to those with the fewest, which soon make room for the next; of equal ones first to those
-- whose weights are resident. Jobs are then shared in turn; the adapter with the most waiting jobs
-- gets what the others leave, and takes its turn with them in one claim of FULLEST_IN_TURN. READY's
-- score is the moment when an adapter was last served, or that when it came to have waiting jobs.
-- worker/scheduler.py has the same rule.
local FULLEST_IN_TURN = 4
local worker, claim, lease, wanted = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local free_slots, patience = tonumber(ARGV[5]), tonumber(ARGV[6])
local position = 7
local function read_set()
  local set, last = {}, position + tonumber(ARGV[position])
  for i = position + 1, last do set[ARGV[i]] = true end
  position = last + 1
  return set
end
local in_use, draining = read_set(), read_set()
local resident = {}
for i = position, #ARGV do resident[ARGV[i]] = true end

local now = now_ms()
local jobs = repeated_claim(worker, claim, lease, false)
if jobs then return { text(now), '', jobs, -1, 0, 0, 0 } end
jobs = {}
local starved_before = now_us() - 1000 * patience
local score, num_waiting = {}, {}
local picks, slotless, fullest = {}, {}, nil

-- What waits: entries stay in the stream until they are acknowledged, so those in flight go off.
local function look_at(name)
  local in_flight = redis.pcall('XPENDING', STREAM .. name, GROUP)
  num_waiting[name] = redis.call('XLEN', STREAM .. name) - (in_flight[1] or 0)
  if not fullest or num_waiting[name] > num_waiting[fullest] then fullest = name end
end

local function is_starved(name)
  return score[name] < starved_before
end

-- Adapters that need no slot any more, and the base model.
local function pick_what_has_a_slot(name)
  score[name] = tonumber(redis.call('ZSCORE', READY, name) or '')
  if score[name] and not draining[name] then
    look_at(name)
    table.insert(picks, name)
  end
end

-- Walks over the other ready adapters, longest unserved first, as far as there may be slots for
-- them; without a free one only that counts which waits for longest. An adapter that only another
-- worker has is left to it; one that the queue does not know at all is taken, so that its jobs fail.
local function find_what_wants_a_slot()
  local first, window = 0, 256
  local enough = free_slots > 0 and window or 1
  while #slotless < enough do
    local found = redis.call('ZRANGE', READY, first, first + window - 1, 'WITHSCORES')
    for i = 1, #found, 2 do
      local name = found[i]
      if name ~= BASE and not in_use[name] and #slotless < enough then
        score[name] = tonumber(found[i + 1])
        if redis.call('SISMEMBER', WORKER .. worker .. ':adapters', name) == 1 then
          look_at(name)
          table.insert(slotless, name)
        elseif redis.call('HEXISTS', ADAPTERS, name) == 0 then
          table.insert(picks, name)
        end
      end
    end
    if #found < 2 * window then return end
    first = first + window
  end
end

pick_what_has_a_slot(BASE)
for name in pairs(in_use) do pick_what_has_a_slot(name) end
find_what_wants_a_slot()

local function gets_a_slot_before(a, b)
  if is_starved(a) ~= is_starved(b) then return is_starved(a) end
  if is_starved(a) then return score[a] < score[b] end
  if (a == fullest) ~= (b == fullest) then return a == fullest end
  if num_waiting[a] ~= num_waiting[b] then return num_waiting[a] < num_waiting[b] end
  if resident[a] ~= resident[b] then return resident[a] == true end
  if score[a] ~= score[b] then return score[a] < score[b] end
  return a < b
end
table.sort(slotless, gets_a_slot_before)
for i = 1, math.min(free_slots, #slotless) do table.insert(picks, slotless[i]) end
local next_one = slotless[free_slots + 1]
local starving = next_one and is_starved(next_one) and next_one or ''

table.sort(picks, function(a, b)
  if score[a] ~= score[b] then return score[a] < score[b] end
  return a < b
end)

-- Entries that bring no job are not free of cost: one script passes over so many and no more.
local MAX_PASSED_OVER = 1000
local num_passed_over, num_set_aside = 0, 0

-- Whether the entry's job can be lent to this worker; if not, what becomes of it.
local function is_to_be_lent(adapter, entry, id)
  local state, alone, v = unpack(redis.call('HMGET', JOB .. id, 'state', 'alone', 'v'))
  local is_read = reads_version(v)
  if not state or is_read and state ~= 'waiting' then
    drop_entry(adapter, entry)
    return false
  end
  redis.call('HSET', JOB .. id, 'entry', entry)
  if not is_read then
    set_aside(id, v)
    num_set_aside = num_set_aside + 1
  elseif alone then
    wait_for_turn(id)
  end
  return is_read and not alone
end

local function deliver(adapter, entry, id)
  if not is_to_be_lent(adapter, entry, id) then
    num_passed_over = num_passed_over + 1
    return
  end
  lend(id, worker, claim, now + lease)
  table.insert(jobs, lent_job(id))
  wanted = wanted - 1
end

-- Delivers up to `count` entries; returns whether there may be more.
local function read(adapter, count)
  local stream = STREAM .. adapter
  local entries = read_entries(adapter, count)
  for _, entry in ipairs(entries) do deliver(adapter, entry[1], entry[2][2]) end
  if #entries < count then
    redis.call('ZREM', READY, adapter)
    if redis.call('XLEN', stream) == 0 then redis.call('DEL', stream) end
    return false
  end
  redis.call('ZADD', READY, 'XX', text(now_us()), adapter)
  return true
end

-- An equal share for every adapter first, then what is left to those that have more.
local function share_among(adapters)
  while wanted > 0 and #adapters > 0 and num_passed_over < MAX_PASSED_OVER do
    local share = math.max(1, math.floor(wanted / #adapters))
    local with_more = {}
    for _, adapter in ipairs(adapters) do
      if wanted <= 0 then break end
      if read(adapter, math.min(share, wanted)) then table.insert(with_more, adapter) end
    end
    adapters = with_more
  end
end

-- The clock's last digits are as good as drawn by lot.
local takes_its_turn = now_us() % FULLEST_IN_TURN == 0
local first, last = {}, {}
for _, name in ipairs(picks) do
  local waits = name == fullest and not takes_its_turn and not is_starved(name)
  table.insert(waits and last or first, name)
end
share_among(first)
share_among(last)
note_claim(worker, claim, lease, jobs)
local _, suspect_since = first_suspect(worker)
return { text(now), starving, jobs, suspect_since and now - suspect_since or -1,
  redis.call('ZCARD', DELAYED), num_set_aside, num_passed_over }
