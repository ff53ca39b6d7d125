"""Every key that Ferry's records use in Redis, and the four scripts that change them, each in one atomic step.

    ferry:<cluster>:move:<id>            hash    document (JSON), revision, status
    ferry:<cluster>:move:<id>:rows       hash    index -> ActorRow (JSON)
    ferry:<cluster>:moves                zset    move ids by creation, as in the next three
    ferry:<cluster>:moves:plan:<id>      zset
    ferry:<cluster>:moves:shard:<n>      zset
    ferry:<cluster>:moves:status:<s>     zset
    ferry:<cluster>:moves:unfinished     set     ids of moves that are not terminal
    ferry:<cluster>:moves:finished       zset    ids of those that are, by creation: what `trim` may delete
    ferry:<cluster>:plan:<id>            hash    field of MigrationPlan -> JSON value
    ferry:<cluster>:plans                zset    plan ids by creation; listed once all moves of the plan are stored
    ferry:<cluster>:plans:running        zset    those without `finished_at`
    ferry:<cluster>:records              int     rows stored; a move without rows counts as one
    ferry:<cluster>:audit                stream  one event per change of a move's status
    ferry:<cluster>:events               stream  what happened to the cluster, in words

Scripts build the key of a status index from its prefix, so Redis must not be a sharded Redis Cluster, which Celery's
broker rules out as well.
"""

from __future__ import annotations


class Keys:
    """The key names of one cluster."""

    def __init__(self, cluster: str) -> None:
        self._prefix = f"ferry:{cluster}"
        self.moves = f"{self._prefix}:moves"
        self.status_prefix = f"{self.moves}:status:"
        self.unfinished = f"{self.moves}:unfinished"
        self.finished = f"{self.moves}:finished"
        self.plans = f"{self._prefix}:plans"
        self.running = f"{self.plans}:running"
        self.records = f"{self._prefix}:records"
        self.audit = f"{self._prefix}:audit"
        self.events = f"{self._prefix}:events"

    def move(self, move_id: str) -> str:
        return f"{self._prefix}:move:{move_id}"

    def rows(self, move_id: str) -> str:
        return f"{self._prefix}:move:{move_id}:rows"

    def plan(self, plan_id: str) -> str:
        return f"{self._prefix}:plan:{plan_id}"

    def plan_moves(self, plan_id: str) -> str:
        return f"{self.moves}:plan:{plan_id}"

    def shard_moves(self, shard: int | str) -> str:
        return f"{self.moves}:shard:{shard}"

    def status_moves(self, status: str) -> str:
        return f"{self.status_prefix}{status}"


# Compare-and-set of one move with everything that hangs on it. Answers {1} or {0, the revision that is stored}.
# ARGV[7] is how many rows the move has from here on; empty: as many as it had or is given. ARGV[8] is how many statuses
# it has passed since, each with its audit event; the last is the one it has now.
# A creation that is repeated word for word succeeds again: its first answer was lost.
SAVE_MOVE = """
local move, rows, moves, plan_moves, shard_moves, status_prefix = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local unfinished, finished, plan, records, audit = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local id, expected, document, outcome, created_at = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local audit_events, rows_total, first_row = ARGV[6], tonumber(ARGV[7]), 9 + 2 * tonumber(ARGV[8])
local status = ARGV[first_row - 2]

local stored = redis.call('HMGET', move, 'revision', 'status', 'document')
local revision, before = stored[1] or '0', stored[2]
if revision ~= expected then
    if expected == '0' and revision == '1' and stored[3] == document then return {1} end
    return {0, tonumber(revision)}
end

local weight = before and math.max(1, redis.call('HLEN', rows)) or 0
redis.call('HSET', move, 'document', document, 'revision', tonumber(expected) + 1, 'status', status)
for i = first_row, #ARGV, 2 do redis.call('HSET', rows, ARGV[i], ARGV[i + 1]) end
while rows_total and redis.call('HDEL', rows, rows_total) == 1 do rows_total = rows_total + 1 end
local growth = math.max(1, redis.call('HLEN', rows)) - weight
if growth ~= 0 then redis.call('INCRBY', records, growth) end

if before == status then return {1} end
redis.call('ZADD', status_prefix .. status, created_at, id)
local plan_exists = redis.call('EXISTS', plan) == 1
if before then
    redis.call('ZREM', status_prefix .. before, id)
    local last = before
    for i = 9, first_row - 2, 2 do
        redis.call(
            'XADD', audit, 'MAXLEN', '~', audit_events, '*', 'before', last, 'after', ARGV[i], 'event', ARGV[i + 1]
        )
        last = ARGV[i]
    end
else
    for _, index in ipairs({moves, plan_moves, shard_moves}) do redis.call('ZADD', index, created_at, id) end
    redis.call('SADD', unfinished, id)
    if plan_exists then redis.call('HINCRBY', plan, 'total', 1) end
end
if outcome ~= '' and redis.call('SREM', unfinished, id) == 1 then
    redis.call('ZADD', finished, created_at, id)
    if plan_exists then redis.call('HINCRBY', plan, outcome, 1) end
end
return {1}
"""

# Ends a move that cannot be read, unless it has been saved since it was seen at revision ARGV[2]: failed, for its plan
# and for the lists. ARGV[3] is its document with that in it; empty: the document stays as it is. Answers 1 when done.
END_MOVE = """
local move, unfinished, finished, moves, plan, status_prefix = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local id, expected, document, status = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local stored = redis.call('HMGET', move, 'revision', 'status')
if (stored[1] or '0') ~= expected or redis.call('SREM', unfinished, id) == 0 then return 0 end

local created_at = redis.call('ZSCORE', moves, id) or 0
redis.call('ZADD', finished, created_at, id)
if stored[2] then
    redis.call('ZREM', status_prefix .. stored[2], id)
    redis.call('ZADD', status_prefix .. status, created_at, id)
    redis.call('HSET', move, 'status', status)
end
if document ~= '' then redis.call('HSET', move, 'document', document, 'revision', tonumber(expected) + 1) end
if redis.call('EXISTS', plan) == 1 then redis.call('HINCRBY', plan, 'failed', 1) end
return 1
"""

# Sets what may still be set of a plan: times once, `cancelled` never back. Answers 0 when there is no such plan,
# which then does not run either.
SAVE_PLAN = """
local plan, running = KEYS[1], KEYS[2]
local id, started_at, finished_at, cancelled = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if redis.call('EXISTS', plan) == 0 then
    redis.call('ZREM', running, id)
    return 0
end
if started_at ~= 'null' then redis.call('HSETNX', plan, 'started_at', started_at) end
if cancelled == 'true' then redis.call('HSET', plan, 'cancelled', 'true') end
if finished_at ~= 'null' then
    redis.call('HSETNX', plan, 'finished_at', finished_at)
    redis.call('ZREM', running, id)
end
return 1
"""

# Forgets one terminal move, and its plan once that is over (or was never listed) and has no moves left. Answers the
# number of records deleted, 0 when somebody else was first.
DELETE_MOVE = """
local move, rows, moves, plan_moves, shard_moves, status_moves = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local finished, plan, plans, running, records = KEYS[7], KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local id, plan_id = ARGV[1], ARGV[2]
if redis.call('ZREM', finished, id) == 0 then return 0 end

local weight = math.max(1, redis.call('HLEN', rows))
redis.call('DEL', move, rows)
for _, index in ipairs({moves, plan_moves, shard_moves, status_moves}) do redis.call('ZREM', index, id) end
redis.call('DECRBY', records, weight)

local over = redis.call('HEXISTS', plan, 'finished_at') == 1 or not redis.call('ZSCORE', plans, plan_id)
if over and redis.call('EXISTS', plan_moves) == 0 then
    redis.call('DEL', plan)
    redis.call('ZREM', plans, plan_id)
    redis.call('ZREM', running, plan_id)
end
return weight
"""
