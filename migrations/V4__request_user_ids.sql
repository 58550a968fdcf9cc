-- The users that a batch was about, in the order of its items; null for a request
-- about one user. Of a batch, `user_id` is the first one, and the fingerprint is
-- made with the fingerprint_salt of every one: when the first of them is erased, it
-- says nothing any more.
alter table requests add column user_ids uuid[];
